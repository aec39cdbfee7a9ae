"""Images of the Hugging Face hub, to be classified."""

import functools

import numpy as np
from jaxtyping import UInt8

from s5eqx._typing import Array, Float, Int, Integer, checked
from s5eqx.data._hub import hub_dataset
from s5eqx.data._random_order import EPOCH, in_epochs, random_bits
from s5eqx.data._task import AbstractCorpus, ImageBatch


class Images(AbstractCorpus):
    """Images of one size and their classes. The values of each channel are shifted and scaled to mean 0 and deviation 1
    over the pixels of the training images.

    Every epoch goes through the training images in an order that is drawn for it. Example i is a function of the
    arrays, of `seed` and of i.

    **Arguments:**

    - `training`, `labels`: what to train on, 8 bits a channel, and the class of each.
    - `evaluated`, `evaluated_labels`: the same for the test.
    - `factor`: average the pixels of squares with so many on a side; divides both sides of an image.
    - `seed`: chooses the orders.
    """

    @checked
    def __init__(
        self,
        training: UInt8[np.ndarray, "N height width channels"],
        labels: Integer[np.ndarray, " N"],
        evaluated: UInt8[np.ndarray, "M height width channels"],
        evaluated_labels: Integer[np.ndarray, " M"],
        *,
        factor: int = 1,
        seed: int = 0,
    ):
        if not len(training) or not len(evaluated):
            raise ValueError(
                f"there must be images for training and for the test; got {len(training)} and {len(evaluated)}."
            )
        if (least := min(labels.min(), evaluated_labels.min())) < 0:
            raise ValueError(
                f"classes count from 0; got {least}. A test whose answers are withheld often has -1: take another."
            )
        height, width = training.shape[1:3]
        if factor < 1 or height % factor or width % factor:
            raise ValueError(f"factor must divide both sides of images of {height} x {width} pixels; got {factor}.")
        random_bits(seed, EPOCH, 0, 0)  # refuses a seed that is none
        self.training, self.labels = training, labels
        self.evaluated, self.evaluated_labels = evaluated, evaluated_labels
        self.factor, self.seed = factor, seed
        self.num_test = len(evaluated)
        self.sequence_length = height * width // factor**2
        self.num_features = training.shape[3]
        self.num_classes = 1 + int(max(labels.max(), evaluated_labels.max()))

    def coarser(self, factor: int) -> "Images":
        """The same images with another `factor`."""
        data = (self.training, self.labels, self.evaluated, self.evaluated_labels)
        return Images(*data, factor=factor, seed=self.seed)

    @checked
    def train(self, indices: Int[Array, " B"]) -> ImageBatch:
        rows = in_epochs(self.seed, np.asarray(indices), len(self.training))
        return self._batch(self.training[rows], self.labels[rows], np.ones(len(rows), np.float32))

    @checked
    def test(self, indices: Int[Array, " B"]) -> ImageBatch:
        indices = np.asarray(indices)
        rows = np.minimum(indices, self.num_test - 1)
        return self._batch(self.evaluated[rows], self.evaluated_labels[rows], np.float32(indices < self.num_test))

    @functools.cached_property
    def statistics(self) -> tuple[Float[np.ndarray, " channels"], Float[np.ndarray, " channels"]]:
        """Mean and deviation of each channel, of 0 to 255, over all pixels of the training images."""
        values = np.arange(256.0)
        channels = np.moveaxis(self.training, -1, 0)
        shares = np.stack([np.bincount(channel.ravel(), minlength=256) / channel.size for channel in channels])
        mean = shares @ values
        deviation = np.sqrt(np.sum(shares * (values - mean[:, None]) ** 2, axis=1))
        return mean.astype(np.float32), np.where(deviation > 0, deviation, 1).astype(np.float32)

    def _batch(self, images, labels, weights):
        count, height, width, channels = images.shape
        f = self.factor
        squares = images.astype(np.float32).reshape(count, height // f, f, width // f, f, channels)
        mean, deviation = self.statistics
        return ImageBatch((squares.mean(axis=(2, 4)) - mean) / deviation, labels.astype(np.int32), weights)


@checked
def read_images(name: str, *, image: str = "img", label: str = "label", factor: int = 1, seed: int = 0) -> Images:
    """The splits `train` and `test` of a data set of the Hugging Face hub, such as `uoft-cs/cifar10`.

    **Arguments:**

    - `image`, `label`: the columns that hold them.
    - `factor`, `seed`: as for `Images`.

    **Raises:** `ConnectionError` where neither the hub nor the cache of `datasets` has them.
    """
    instead = "Fetch it where there is a network, or take a task that is generated, `Shapes`."
    found = hub_dataset(name, "data set", instead=instead)
    parts = []
    for split in ("train", "test"):
        if split not in found or not {image, label} <= set(found[split].column_names):
            given = ", ".join(f"{part} with {' and '.join(rows.column_names)}" for part, rows in found.items())
            raise ValueError(
                f"the data set {name} must have the splits train and test with columns {image} and {label}; it has "
                f"{given}."
            )
        pictures = list(found[split][image])
        if other := {picture.mode for picture in pictures} - {"L", "RGB", "RGBA"}:
            raise ValueError(
                f"the images of {name} must be grey or in colours, of 8 bits; {split} has some of mode {sorted(other)}."
            )
        images = [np.asarray(picture) for picture in pictures]
        if len(forms := {(pixels.dtype.name, *pixels.shape) for pixels in images}) != 1:
            raise ValueError(f"the images of {name} must be of one size and kind; {split} has {sorted(forms)[:3]}.")
        stacked = np.stack(images)
        parts += [stacked if stacked.ndim == 4 else stacked[..., None], np.asarray(found[split][label])]
    return Images(*parts, factor=factor, seed=seed)
