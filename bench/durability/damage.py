"""Files that were cut short or have a bit flipped, one place a trial: of runs, of data sets, of unfinished work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from bench.durability import reading
from bench.durability.processes import Ended
from bench.durability.tasks import HALF, MODES, Prepared, half_done, resume_arguments, simulate_arguments
from bench.durability.trial import CONTINUED, LOST, SAID, SILENT, Outcome, Part, Trial, compared, fresh_folder

CUT = 0.3  # share of the trials that cut a file short
HEADER = 0.4  # share of the flips in a file's first 2 kB, where headers lie


def damage(trial: Trial, path: Path) -> str:
    """Flips a bit of the file or cuts it; returns what was done."""
    content = bytearray(path.read_bytes())
    if trial.random.random() < CUT:
        length = trial.random.randrange(len(content))
        path.write_bytes(content[:length])
        done = f"{path.name} cut to {length} of {len(content)} bytes"
    else:
        end = min(2048, len(content)) if trial.random.random() < HEADER else len(content)
        place, bit = trial.random.randrange(end), trial.random.randrange(8)
        before = bytes(content[max(0, place - 12) : place + 12])
        content[place] ^= 1 << bit
        path.write_bytes(content)
        done = f"{path.name} byte {place} of {len(content)} bit {bit} near {before!r}"
    trial.story.append(done)
    return done


def said_of(ended: Ended, *names: str) -> bool:
    """A refusal that names a file or a setting, without a traceback."""
    return ended.code in (2, 3) and "Traceback" not in ended.text and any(name in ended.text for name in names)


def _half(trial: Trial) -> tuple[str, Path]:
    name = HALF[trial.number % len(HALF)]
    shutil.copytree(half_done(trial.prepared, name), fresh_folder(trial.folder) / "run")
    return name, trial.folder / "run"


def damaged_checkpoint(trial: Trial) -> Outcome:
    """The last or the best one, or the copy of a manifest for people; where another is whole, the message names it."""
    name, run = _half(trial)
    file = trial.random.choices(("last.safetensors", "best.safetensors", "last.json", "best.json"), (6, 5, 1, 1))[0]
    done = damage(trial, run / "checkpoints" / file)
    ended = trial.run(resume_arguments(run))
    if said_of(ended, str(run / "checkpoints" / file)):
        other = run / "checkpoints" / ("best.safetensors" if "last" in file else "last.safetensors")
        if f"give {other}" not in ended.text:
            return Outcome(LOST, f"{done}: does not name {other.name}, which is whole")
        best = reading.best_score(run)
        ended = trial.run(resume_arguments(other))
        if not ended.trained:
            return Outcome(LOST, f"{done}: then {ended.code} {ended.last_line}")
        if best is not None and "last" in file and reading.best_score(run) > best:
            return Outcome(LOST, f"{done}: the best got worse")
        return Outcome(SAID)
    outcome = compared(trial, ended, run, name)
    if outcome.verdict == SILENT and f"checkpoints/{file} is damaged" in ended.text:
        return Outcome(SAID)
    return Outcome(outcome.verdict, f"{done}: {outcome.detail}" if outcome.detail else "")


def damaged_settings(trial: Trial) -> Outcome:
    """config.toml of a run."""
    name, run = _half(trial)
    file = run / "config.toml"
    keys = _keys(file.read_text())
    done = damage(trial, file)
    ended = trial.run(resume_arguments(run))
    if said_of(ended, *(f"{key} was " for key in keys)):
        return Outcome(SAID)
    if said_of(ended, str(file)):
        return _with_settings_of_the_checkpoint(trial, run, name, ended)
    outcome = compared(trial, ended, run, name)
    if outcome.verdict == LOST and ended.code in (2, 3) and "Traceback" not in ended.text:
        return Outcome(LOST, f"{done}: does not name the file: {ended.last_line}")
    if outcome.verdict == SILENT and any(f"note: {key} was " in ended.text for key in keys):
        return Outcome(SAID)
    return Outcome(outcome.verdict, f"{done}: {outcome.detail}" if outcome.detail else "")


def _with_settings_of_the_checkpoint(trial: Trial, run: Path, name: str, ended: Ended) -> Outcome:
    """Follows the advice to remove the file: the run then is the undisturbed one."""
    if f"Or remove {run / 'config.toml'}" not in ended.text:
        return Outcome(SAID)
    (run / "config.toml").unlink()
    outcome = compared(trial, trial.run(resume_arguments(run)), run, name)
    return Outcome(SAID) if outcome.verdict == CONTINUED else outcome


def _keys(text: str) -> list[str]:
    """'section.key' of every value in a config.toml."""
    found, section = [], ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif " = " in line:
            found.append(f"{section}.{line.partition(' = ')[0]}")
    return found


def damaged_record(trial: Trial) -> Outcome:
    """What a run tells people: training goes on without it, and `why` says what it cannot read."""
    name, run = _half(trial)
    file = trial.random.choices(("metrics.jsonl", "summary.json", "env.json"), (3, 1, 1))[0]
    done = damage(trial, run / file)
    why = trial.run(["why", str(run)])
    if "Traceback" in why.text or why.code not in (0, 2, 3, 4):
        return Outcome(LOST, f"{done}: why ends with {why.code}: {why.last_line}")
    outcome = compared(trial, trial.run(resume_arguments(run)), run, name)
    return Outcome(outcome.verdict, f"{done}: {outcome.detail}" if outcome.detail else "")


def _damaged_data(kind: str, choose: Callable[[Path], list[Path]]) -> Callable[[Trial], Outcome]:
    def trial_of(trial: Trial) -> Outcome:
        fresh_folder(trial.folder)
        shutil.copytree(trial.prepared.folder / kind, trial.folder / kind)
        path = trial.random.choice(choose(trial.folder / kind))
        done = damage(trial, path)
        run = trial.folder / "run"
        ended = trial.run(MODES[kind].arguments(run, Prepared(trial.folder)))
        if said_of(ended, str(path), "manifest.json"):
            return Outcome(SAID)
        if path.name == "manifest.json" and said_of(ended, str(path.parent)):
            return Outcome(SAID)
        outcome = compared(trial, ended, run, kind)
        return Outcome(outcome.verdict, f"{done}: {outcome.detail}" if outcome.detail else "")

    return trial_of


def damaged_work(trial: Trial) -> Outcome:
    """What an interrupted `simulate` has done so far: it is made anew where it is not as it was written."""
    out = fresh_folder(trial.folder) / "scenes"
    arguments, partial = simulate_arguments(out), trial.folder / "scenes.partial"
    wanted = trial.random.randint(1, 6)  # files, the plan among them
    trial.server.start(arguments, trial.folder)
    while len(_visible(partial)) < wanted and trial.server.wait(0.002) is None:
        pass
    trial.server.kill()
    found = _visible(partial)
    done = damage(trial, trial.random.choice(found)) if found else "nothing yet"
    ended = trial.run(arguments) if not out.exists() else None
    if ended is not None and said_of(ended, str(partial)):
        if not found or "emove " not in ended.text:
            return Outcome(LOST, f"{done}: {ended.last_line}")
        return Outcome(SAID)
    if ended is not None and ended.code != 0:
        return Outcome(LOST, f"{done}: {ended.code}: {ended.last_line}")
    wrong = reading.apart(reading.files(out), trial.prepared.files)
    return Outcome(SILENT, f"{done}: differs in {', '.join(wrong)}") if wrong else Outcome(CONTINUED)


def _visible(folder: Path) -> list[Path]:
    """Files that no writer is still busy with."""
    return sorted(path for path in folder.glob("[!.]*"))


def _manifest(folder: Path) -> list[Path]:
    return [folder / "manifest.json"]


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("test"))


def _npz(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.npz") if path.parent.name != "test")


PARTS = (
    Part("damaged checkpoint", 65, damaged_checkpoint),
    Part("damaged settings", 30, damaged_settings),
    Part("damaged record", 25, damaged_record),
    Part("damaged manifest", 20, _damaged_data("shards", _manifest)),
    Part("damaged shard", 20, _damaged_data("shards", _shards)),
    Part("damaged .npz", 20, _damaged_data("npz", _npz)),
    Part("damaged unfinished work", 20, damaged_work),
)
