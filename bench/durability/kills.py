"""`kill -9` at random moments of train and of simulate, once or twice; then the same run continues."""

from __future__ import annotations

from bench.durability import reading
from bench.durability.tasks import MODES, TRIES, moment, resume_arguments, simulate_arguments
from bench.durability.trial import CONTINUED, LOST, SILENT, Outcome, Part, Trial, compared, fresh_folder


def kill_train(trial: Trial) -> Outcome:
    name = list(MODES)[trial.number % len(MODES)]
    run = trial.folder / "run"
    start = MODES[name].arguments(run, trial.prepared)
    for _ in range(TRIES):
        fresh_folder(trial.folder)
        if trial.killed_after(start, moment(trial.random, trial.prepared.seconds[name])):
            break
    best = reading.best_score(run)
    if trial.random.random() < 0.5 and best is not None:  # a second kill, of the run that continues
        trial.killed_after(resume_arguments(run), moment(trial.random, trial.prepared.seconds[name]))
        again = reading.best_score(run)
        if again is None or again > best:
            return Outcome(LOST, f"the best one scored {best}, and {again} after the second kill")
    ended = trial.continued(run, start)
    outcome = compared(trial, ended, run, name, rows=True)
    left = list(run.rglob("*.partial"))
    return Outcome(LOST, f"{left[0].name} stays") if outcome.verdict == CONTINUED and left else outcome


def kill_simulate(trial: Trial) -> Outcome:
    out = trial.folder / "scenes"
    arguments = simulate_arguments(out)
    seconds = trial.prepared.seconds["simulate"]
    for _ in range(TRIES):
        fresh_folder(trial.folder)
        if trial.killed_after(arguments, moment(trial.random, seconds)):
            break
    if trial.random.random() < 0.5:
        trial.killed_after(arguments, moment(trial.random, seconds))
    if not out.exists() or not any(out.iterdir()):
        ended = trial.run(arguments)
        if ended.code != 0:
            return Outcome(LOST, f"exit code {ended.code}: {ended.last_line}")
    wrong = reading.apart(reading.files(out), trial.prepared.files)
    if wrong:
        return Outcome(SILENT, f"differs in {', '.join(wrong)}")
    left = sorted(path.name for path in trial.folder.iterdir() if path.name not in ("scenes", "log"))
    return Outcome(LOST, f"{left} stays") if left else Outcome(CONTINUED)


PARTS = (Part("kill train", 100, kill_train), Part("kill simulate", 100, kill_simulate))
