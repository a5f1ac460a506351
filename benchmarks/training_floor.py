"""A lower bound of a training step: its matrix products at the rate of a large one, and everything else at the speed of
a copy.

The step is that of the paper's network (no residuals, no dropout), counted for rows that are snippets of recordings:
padding, gaps and rounding are work that a step could do without. Products read and write memory at the rate that was
measured, so only what other kernels move is counted, each tensor as often as the fewest such kernels must: one pass
after a convolution forward (bias, activation, mask), one before it backward (their gradients), one for the
loss's tensors each way, one for Adam. Convolutions that did a pass's work themselves would be below this floor.
"""

from __future__ import annotations

from typing import NamedTuple

from d2net.recipes import ModelRecipe

BYTES = {"fp32": 4, "tf32": 4, "bf16": 2}  # of an activation, of a weight that a product reads, and of its gradient
FLOAT32 = 4


class Layer(NamedTuple):
    """A convolution over time."""

    width_in: int
    width_out: int
    kernel: int

    @property
    def weights(self) -> int:
        return self.width_in * self.width_out * self.kernel


class Network(NamedTuple):
    """The shapes of D2-Net: streams of equal width, each with these layers."""

    streams: int
    first: Layer
    second: Layer
    classifier: Layer

    @classmethod
    def of(cls, width: int, classes: int, recipe: ModelRecipe) -> Network:
        """The network of two streams that a recipe describes.

        Raises:
            ValueError: residuals or dropout, whose passes are not counted here.
        """
        if recipe.residual or recipe.dropout:
            raise ValueError("the floor is that of a network without residuals and dropout")
        hidden, kernel = recipe.embedding_dim or width, recipe.kernel_size
        return cls(
            2,
            Layer(width, hidden, kernel),
            Layer(hidden, hidden, kernel),
            Layer(hidden, classes, recipe.classifier_kernel_size or kernel),
        )

    @property
    def parameters(self) -> int:
        layers = (self.first, self.second, self.classifier)
        return self.streams * sum(layer.weights + layer.width_out for layer in layers)


def products(network: Network, rows: float) -> float:
    """Floating-point operations of the convolutions' matrix products in one step with ``rows`` snippets.

    Forward, gradients of the weights, and gradients of the inputs, which the first layer does not need.
    """
    weights = 2 * network.first.weights + 3 * network.second.weights + 3 * network.classifier.weights
    return 2 * rows * network.streams * weights


def moved(network: Network, rows: float, precision: str) -> dict[str, float]:
    """Bytes that everything but the products moves in one step with ``rows`` snippets, by what moves them."""
    size, streams = BYTES[precision], network.streams
    features = rows * streams * network.first.width_in * size
    hidden = rows * streams * network.first.width_out * size  # of the first layers
    embedded = rows * streams * network.second.width_out * size  # of the second layers
    embeddings = embedded / streams  # their mean
    logits = rows * streams * network.classifier.width_out * size
    tcam = rows * network.classifier.width_out * FLOAT32
    copies = network.parameters * size if size < FLOAT32 else 0
    return {
        # Resident features are read and the batch is written.
        "gather": 2 * features,
        # Each is read as the convolution wrote it, and written; the mean of the second ones on the way.
        "first layers, forward": 2 * hidden,
        "second layers, forward": 2 * embedded + embeddings,
        # The TCAM from the logits; their gradient from them and the TCAM's.
        "logits and TCAM, forward": logits + tcam,
        "logits and TCAM, backward": 2 * logits + tcam,
        # Embeddings are read for Eq. 2, for Eq. 8 once x_ref is known, and backward; their gradient is written. The
        # TCAM is read both ways, its gradient written.
        "loss": 4 * embeddings + 3 * tcam,
        # The gradient of the output and the output's sign are read, that of the input is written; the embeddings' is
        # added on the way.
        "second layers, backward": 3 * embedded + embeddings,
        "first layers, backward": 3 * hidden,
        # Weight, both moments: read and written. The gradient is read, and the bfloat16 copy of the weight written.
        "Adam": network.parameters * (6 * FLOAT32 + size) + copies,
    }


class Floor(NamedTuple):
    """The bound in seconds, and what it is of."""

    flop: float
    bytes: float
    products: float
    rest: float

    @property
    def seconds(self) -> float:
        return self.products + self.rest


def floor(network: Network, rows: float, precision: str, flops: float, bytes_per_s: float) -> Floor:
    """The bound for a step with ``rows`` snippets, at these rates."""
    flop, size = products(network, rows), sum(moved(network, rows, precision).values())
    return Floor(flop, size, flop / flops, size / bytes_per_s)
