"""The table of causes: what a finding may say is wrong, from the most certain family of evidence to the least.

A fault of the suite names the causes that a diagnosis should report first; a rule names the one that it found. How a
cause is seen and how it is fixed is in its page, `pages/NAME.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import resources


@dataclass(frozen=True)
class Cause:
    """One thing that may be wrong.

    Args: rank: place in the table, from 0: findings are reported in this order; level: family of evidence, which is
        the severity of its findings; meaning: one line, without a capital or a full stop.
    """

    name: str
    level: str
    rank: int
    meaning: str

    @cached_property
    def body(self) -> str:
        """The page as it is on disk: '## Evidence' and '## Fix'."""
        return resources.files("ris_fast.health").joinpath("pages", f"{self.name}.md").read_text(encoding="utf-8")

    @property
    def page(self) -> str:
        """What the cause is, how it is seen and how it is fixed, in Markdown."""
        return f"# {self.name}\n\n{self.meaning[0].upper()}{self.meaning[1:]}.\n\n{self.body}"

    @property
    def fix(self) -> str:
        """The first paragraph under 'Fix' of the page, in one line: the advice of a finding."""
        return " ".join(self.body.partition("## Fix\n")[2].strip().split("\n\n")[0].split())


# Within a level, what comes first explains what comes later.
_MEANINGS: dict[str, dict[str, str]] = {
    "structural": {
        "nonfinite_data": "scenes carry NaN or infinite values",
        "manifest_differs": "what is read of a data set is not what its manifest says was written",
        "scenes_altered": (
            "the network writes into the scenes that it is given, so that the next to read them sees others"
        ),
        "empty_cache_slot": "some batches arrive as zeros",
        "constant_input": "every scene shows the network the same input",
        "constant_targets": "all scenes have the same target",
        "rank_sees_other_data": (
            "a rank trains on other scenes than its own: on another rank's, or on others than their numbers stand for"
        ),
        "repeated_batch": "the same scenes are served again and again",
        "stale_cache": "part of a batch comes from an earlier one",
        "task_differs": (
            "the task is not the one that the data were made with: its array, wavelength or symbols are others"
        ),
        "mismatched_channel": "the channel belongs to other scenes than the snapshots",
        "wrong_layout": "real and imaginary parts, or axes, are read in another order than they were written",
        "shuffled_labels": "targets belong to other scenes than inputs",
        "parts_unrelated": (
            "snapshots, channel and target of a scene do not belong together, in no order that was tried"
        ),
        "snr_labels_differ": "the SNR that scenes are labelled with is not the one that their snapshots have",
        "scenes_change": "a scene that is read twice is not the same scene",
        "distributions_differ": (
            "training scenes, validation scenes and the task's settings do not have the same distribution"
        ),
        "split_overlap": "validation scenes are training scenes",
        "stale_optimizer_parameters": "the optimizer holds tensors that the network does not use",
        "ranks_diverged": "ranks, which should hold the same weights to the last bit, hold different ones",
        "stale_compiled_graph": (
            "a compiled or copied network computes with weights that are not the ones being trained"
        ),
        "compiled_differs": "what the step calls gives other numbers than the network as written",
        "cached_validation": "validation reuses outputs computed earlier",
        "unregistered_parameters": (
            "tensors that the loss reaches are parameters of no module, so nothing updates or saves them"
        ),
        "shadowed_parameters": "the model's own list of parameters or modes leaves out layers that it uses",
        "tied_parameters": "two layers that should differ share one tensor",
        "duplicate_parameters": "a parameter is updated twice: by two groups or by two optimizers",
        "frozen_parameters": "parameters that training is supposed to move have requires_grad=False",
        "missing_from_optimizer": "trainable parameters of the network are in no group of the optimizer",
        "low_precision_weights": "updates are smaller than the spacing of the weights' number format",
        "step_without_effect": (
            "the optimizer's step leaves weights as they are although gradient and rate are above zero"
        ),
        "zero_learning_rate": "the learning rate of a group is zero",
        "zero_loss_weight": "a term that should drive training has weight zero",
        "batchnorm_statistics": "a normalisation validates with running statistics unlike those it trains with",
        "eval_mode_in_training": "the network, or a part of it, trains in evaluation mode",
        "train_mode_in_validation": "modules are in training mode while the network is validated",
        "unsettled_buffers": "a layer is evaluated with buffers that no training pass has updated yet",
        "loss_rebuilt": "the loss that is differentiated is a new tensor made from a number or an array",
        "detached_loss": "the covariance loss does not depend on the factors through autograd",
        "dead_loss_term": "an enabled term of the loss is constant",
        "conjugation_error": (
            "a transpose, or a real and an imaginary part, is used where the conjugate transpose belongs"
        ),
        "wrong_units": "angles or other quantities are compared in different units",
        "loss_sign": "the loss grows as the prediction gets better",
        "target_scale_differs": "prediction and target are normalised or loaded differently, so the truth has a loss",
        "shapes_broadcast": "prediction and target have different shapes and are broadcast against each other",
        "softmax_twice": "a softmax or sigmoid is applied to outputs before a loss that applies it itself",
        "scenes_mixed": "what the network answers for one scene depends on the others of its batch",
        "batch_shrinks": "the batch has fewer scenes inside the network than it was given",
        "heavy_dropout": "dropout removes nearly all of the signal",
        "epsilon_swallows_signal": "an epsilon in a denominator is larger than the signal beside it",
        "input_scale": "an input reaches the network many orders of magnitude too small or too unequal",
        "inputs_withhold_answer": "the network's inputs do not contain what the target is made of",
        "ignored_input": "the output does not depend on the input",
        "saturated_output": "the output sits at the ends of a saturating function",
        "limited_output": "the output cannot take values that the targets have",
        "clamped_loss": "the loss is clamped, so that it has no gradient where training starts",
        "symmetric_init": "units start equal and receive equal gradients, so they stay equal",
        "zero_product_init": "both factors of a product start at zero, where its gradient vanishes",
        "dead_units": "a layer's units are zero for every input",
        "bad_initialisation": "initial weights make activations explode or vanish",
        "non_differentiable": "a rounding, comparison or argmax in the path has derivative zero everywhere",
        "zeroed_gradients": "gradients exist and something sets them to zero on their way",
        "detached_backbone": "gradients stop inside the network, before they reach all of it",
        "losses_differ": "training and validation give the same scenes another loss",
        "wrong_backward": "an operator's backward is not the derivative of its forward",
        "recomputed_differently": (
            "the backward pass differentiates another forward pass than the one that made the loss"
        ),
        "gradient_scale_differs": (
            "one part of the network receives its gradient at another scale than the derivative of the loss"
        ),
        "scenes_left_out": "some scenes of a batch have no gradient at the output",
        "output_rank_too_low": "the output has fewer independent columns than the scenes have sources",
        "cannot_memorise": "the network does not learn even a few scenes that it sees again and again",
        "unused_head": "parameters whose output no term of the loss uses",
        "kernel_differs": "a kernel gives other numbers than its plain definition",
    },
    "contract": {
        "step_never_called": "gradients are computed and the optimizer never steps",
        "forwards_without_backward": "most forward passes in training reach no backward",
        "step_called_twice": "the optimizer steps more than once a batch",
        "step_once_per_epoch": "forward, backward and step run once an epoch instead of once a batch",
        "batches_skipped": "batches of the epoch never reach the network",
        "scaler_skips_all": "the loss scale overflows every gradient, so every step is skipped",
        "unscaled_twice": "the loss scale is taken out of the gradients twice",
        "sanitised_gradients": "NaN or infinite gradients are replaced by numbers before the optimizer sees them",
        "fp16_overflow": "an activation or the loss leaves the range of its number format",
        "gradient_underflow": "gradients fall below the smallest number of their format and become zero",
        "gradients_cleared_before_step": "gradients are set to zero between backward and step",
        "clip_before_unscale": "gradients are clipped while still multiplied by the loss scale",
        "gradients_never_cleared": "gradients of all earlier steps are added up",
        "last_micro_batch_only": "only one micro-batch of a step contributes to the gradient",
        "micro_batches_differ": "micro-batches of a step reach different parts of the network",
        "rank_gradient_missing": "a rank's gradient is zero, or not in the sum that every rank should step with",
        "clipped_apart": "gradients are scaled by different factors on different ranks or tensors",
        "accumulation_not_divided": "micro-batches are summed with other weights than their share of the step",
        "schedule_per_epoch": "the learning rate is planned in steps and advanced once an epoch",
        "schedule_per_batch": "the learning rate follows micro-batches instead of optimizer steps",
        "learning_rate_off_plan": "something sets the learning rate to other values than its schedule has",
        "weights_reset": "weights are put back to earlier values while training goes on",
        "weights_changed_outside": "something other than the optimizer changes the weights between steps",
        "settings_changed": "what is trained, or how, changed during the run",
        "ema_saved_over_raw": "averaged weights replace the raw ones, and training goes on from them",
        "optimizer_state_lost": "the optimizer is built anew during the run and forgets its moments",
        "ema_nonfinite": "the averaged weights are not finite while the raw ones are",
        "raw_not_validated": "the validation of the raw weights is in truth that of the average",
        "ema_equals_raw": "the average keeps nothing, so it is the raw weights again",
        "ema_frozen": "the averaged weights do not follow the raw ones",
    },
    "gradient": {
        "nonfinite_step": (
            "the optimizer's step makes weights that are NaN or infinite out of gradients that are finite"
        ),
        "nonfinite_gradients": (
            "gradients, or the loss that they come from, are NaN or infinite although the data are finite"
        ),
        "dominating_term": "one auxiliary term supplies nearly all of the gradient",
        "vanishing_gradient": "gradients arrive and are exactly zero",
        "clip_too_small": "the clip threshold leaves next to nothing of the gradient",
    },
    "movement": {
        "warmup_too_long": "the learning rate is still warming up when the run ends",
        "learning_rate_too_large": "updates are as large as the weights, and training diverges",
        "weight_decay_too_large": "weight decay shrinks the weights faster than the gradient moves them",
        "learning_rate_too_small": "updates are too small beside the weights to matter within the run",
        "no_progress": "no step has been made for a long time",
    },
    "outcome": {
        "ema_cold": "the averaged weights are still mostly the initial ones when they are validated",
        "collapsed": "the run had learned and lost it again: validation went back up towards the constant answer",
        "validation_apart": "training has learned, and validation is no better than a constant answer",
        "part_not_learned": "some scenes are learned and others are not at all",
        "overfitting": "the network memorises its few training scenes: training falls and validation does not",
        "stalled_above_inputs": (
            "the run stands still above what a classical estimator makes of the network's own inputs"
        ),
        "stalled_at_baseline": "the run was long enough, and it learned no more than a constant answer knows",
    },
}
_ROWS = [(name, level, meaning) for level, causes in _MEANINGS.items() for name, meaning in causes.items()]
CAUSES = {name: Cause(name, level, rank, meaning) for rank, (name, level, meaning) in enumerate(_ROWS)}

# What is seen of a cause elsewhere: a finding on the left follows from one on the right, and is reported behind it.
_FOLLOWS: dict[str, str] = {
    "scenes_change": "scenes_altered stale_cache repeated_batch constant_input empty_cache_slot",
    "distributions_differ": (
        "task_differs mismatched_channel wrong_layout shuffled_labels parts_unrelated snr_labels_differ stale_cache"
        " wrong_units nonfinite_data"
    ),
    "split_overlap": "stale_cache",
    "compiled_differs": "train_mode_in_validation eval_mode_in_training shadowed_parameters stale_cache scenes_altered",
    "missing_from_optimizer": "stale_optimizer_parameters shadowed_parameters",
    "step_without_effect": "zero_learning_rate low_precision_weights nonfinite_step",
    "weights_changed_outside": "duplicate_parameters low_precision_weights nonfinite_step",
    "wrong_units": "wrong_layout",
    "target_scale_differs": "scenes_altered stale_cache shapes_broadcast conjugation_error",
    "scenes_mixed": "stale_cache scenes_change train_mode_in_validation",
    "inputs_withhold_answer": (
        "constant_input stale_cache scenes_change wrong_layout shuffled_labels mismatched_channel parts_unrelated"
        " ignored_input input_scale"
    ),
    "losses_differ": (
        "scenes_altered stale_cache train_mode_in_validation eval_mode_in_training batchnorm_statistics"
        " shadowed_parameters"
        " unsettled_buffers"
    ),
    "output_rank_too_low": "ignored_input dead_units zero_product_init saturated_output",
    "dead_units": "bad_initialisation input_scale",
    "saturated_output": "bad_initialisation input_scale",
    "zeroed_gradients": (
        "dead_units clamped_loss zero_product_init ignored_input saturated_output bad_initialisation input_scale"
    ),
    "vanishing_gradient": (
        "dead_units clamped_loss zero_product_init ignored_input saturated_output bad_initialisation input_scale"
    ),
    "wrong_backward": (
        "scenes_altered stale_cache recomputed_differently bad_initialisation losses_differ detached_backbone"
        " scenes_left_out stale_compiled_graph"
    ),
    "unused_head": "stale_compiled_graph detached_loss loss_rebuilt unregistered_parameters shadowed_parameters",
    "kernel_differs": (
        "conjugation_error loss_sign target_scale_differs shapes_broadcast clamped_loss scenes_left_out wrong_units"
        " wrong_backward detached_loss fp16_overflow"
    ),
    "step_never_called": "gradients_cleared_before_step",
    "gradients_never_cleared": "missing_from_optimizer stale_optimizer_parameters",
    "nonfinite_gradients": "nonfinite_data fp16_overflow bad_initialisation input_scale",
    "ema_saved_over_raw": "nonfinite_step",
    "ema_nonfinite": "nonfinite_step",
    "ema_frozen": "nonfinite_step step_without_effect weights_reset",
    "raw_not_validated": "step_once_per_epoch",
}
FOLLOWS = {name: frozenset(causes.split()) for name, causes in _FOLLOWS.items()}
