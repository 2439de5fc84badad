"""Where else a run can be followed, by name; a new tracker is one file and one line. TensorBoard's is always kept."""

from impasto.core.registry import Registry

TRACKERS = Registry("tracker", {
    "wandb": "impasto.training.trackers.weights_biases:WeightsBiases",
})
