"""The trainer and its parts without the command line: five seconds of the laptop preset, and no files."""

import torch

from ris_fast import CovarianceLoss, SceneGenerator, Trainer, build_model, load_config, simulate

config = load_config(preset="laptop", overrides=["training.max_seconds=5", "report.plots=false"])
scenes = simulate(config.task, torch.arange(8), SceneGenerator(seed=0, split="train"))
model = build_model("backprojection", config.task)
prediction = model(scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db)  # .factor: (8, 144, Q, 2)
total, terms = CovarianceLoss(config.loss, config.task)(prediction, scenes)  # the sum, and each term before its weight
print(f"untrained: {total.item():.3f}", {name: round(term.item(), 3) for name, term in terms.items()})
print("trained:", Trainer(config).fit()["best_val_nmse"])  # the whole loop
