"""The watch over one run: preflight before it, rules over its rows while it trains, one ranked list of findings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from ris_fast.config.spelling import words
from ris_fast.health.finding import Finding, ranked
from ris_fast.health.monitor.explanations import explanations
from ris_fast.health.monitor.history import RunHistory
from ris_fast.health.monitor.rules import rules_of
from ris_fast.health.names import check_beginnings, known_causes
from ris_fast.health.preflight.rereads import AUGMENTED, MASKED_ANEW
from ris_fast.health.preflight.run import Result, described, run_checks
from ris_fast.training.callback import Callback
from ris_fast.training.state import RunStopped
from ris_fast.training.trainer import Trainer

STOPPING = ("structural", "contract")


class Watchdog(Callback):
    """Collects findings about a run, most certain first, and adds them to its summary.

    Args:
        muted: causes that are not reported; those of `health.mute` are added.
        stop: end the run (RunStopped, exit code 4) at a certain finding that is structural or breaks a contract.
        report: called with each finding when a row first shows it; not with one that ends the run, which its error
            names.
    """

    def __init__(
        self,
        trainer: Trainer,
        muted: Iterable[str] = (),
        *,
        stop: bool = False,
        report: Callable[[Finding], None] | None = None,
    ) -> None:
        self.trainer, self.stop, self.report = trainer, stop, report
        self.muted = known_causes(muted, "muted") | known_causes(words(trainer.config.health.mute), "health.mute")
        check_beginnings(
            words(trainer.config.health.frozen), [name for name, _ in trainer.model.named_parameters()], "health.frozen"
        )
        self.checks: list[Result] = []
        self.run = RunHistory()
        self._found: list[Finding] = []
        self._rules: dict[str, bool] = {}  # every rule that has looked, and whether it has found anything

    @property
    def findings(self) -> list[Finding]:
        return ranked(self._found, self.muted)

    def preflight(self, progress: Callable[[Result], None] | None = None) -> list[Finding]:
        """The checks before the first step; the trainer is left as it was."""
        self.checks = run_checks(self.trainer, progress=progress)
        self.trainer.preflight = [check.name for check in self.checks if check.passed and check.reached]
        self._found += [finding for check in self.checks for finding in check.findings]
        return self.findings

    @property
    def ruled_out(self) -> dict[str, list[str]]:
        """Names of the checks that passed and of the rules that looked at the run and found nothing."""
        return {
            "checks": list(self.trainer.preflight),
            "rules": [name for name, found in self._rules.items() if not found],
        }

    def verdict(self) -> str:
        """One line: nothing found, or the most certain cause."""
        found = self.findings
        return f"{found[0].cause}: {found[0].evidence}" if found else "nothing found"

    # ---- callback -----------------------------------------------------------------------------------------------

    def on_train_start(self, info: dict[str, Any]) -> None:
        self.run.info = info | {"masked_anew": any(check.note in (AUGMENTED, MASKED_ANEW) for check in self.checks)}

    def on_log(self, row: dict[str, Any]) -> None:
        self.run.steps.append(row)
        self._judge("step")

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        self.run.epochs.append(row)
        self._judge("epoch")

    def on_summary(self, summary: dict[str, Any]) -> None:
        self.run.summary = summary
        try:
            self._judge("finish", stop=False)
            self.add_findings(summary)
        except Exception as error:  # a mistake in a rule; the summary is written behind this callback
            warnings.warn(f"the health of the finished run was not judged: {described(error)}", stacklevel=2)

    def add_findings(self, summary: dict[str, Any]) -> None:
        """Adds the causes that were found, most certain first, their evidence, what was ruled out, and for a run that
        stalled each explanation with what speaks for it or against it."""
        found = self.findings
        names = [finding.cause for finding in found]
        rest = [name for name in summary.get("findings", ()) if name not in names]
        summary["findings"] = names + rest
        summary["evidence"] = [finding.to_json() for finding in found]
        summary["ruled_out"] = self.ruled_out
        if summary["verdict"] == "stalled":
            summary["explanations"] = [each.to_json() for each in explanations(self.run, found, self.checks)]

    def _judge(self, event: str, *, stop: bool = True) -> None:
        new = []
        for rule in rules_of(event):
            found = list(rule(self.run))
            self._rules[rule.__name__] = self._rules.get(rule.__name__, False) or bool(found)
            new += found
        known = {finding.cause for finding in self._found}
        first_seen = [finding for finding in new if finding.cause not in known]
        self._found += first_seen
        first = next(iter(ranked(new, self.muted)), None)
        if stop and self.stop and first is not None and first.certain and first.severity in STOPPING:
            raise RunStopped(str(first), first.cause)
        if event != "finish" and self.report is not None:
            for finding in ranked(first_seen, self.muted):
                self.report(finding)
