"""A language model on sequences whose length is split over devices."""

import equinox as eqx
import jax.random as jr
from jax import lax

from s5eqx._typing import Array, Bool, Float, Int, PRNGKeyArray, checked
from s5eqx.models.language_model import LanguageModel
from s5eqx.nn._shards import in_shards


class SequenceParallel(eqx.Module):
    """`model` inside `jax.shard_map`, on this device's piece of each sequence: one sequence can be as long as the
    memory of all devices allows.

        split = PartitionSpec("sequence")
        run = lambda tokens: SequenceParallel(model, "sequence")(tokens)
        logits = jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=split)(tokens)

    Devices exchange the states of the S5 layers and the tails of the short convolutions, and nothing else; the result
    is that of one device. Dropout, which needs a `key`, is drawn for each piece. Pieces have one length.

    Every mixer must be an `S5`, a `ShortConv` or made of them, and the model must have no learned positions.
    """

    model: LanguageModel
    axis_name: str = eqx.field(static=True)

    def __check_init__(self):
        if self.model.positions is not None:
            raise ValueError(
                "A model with learned positions cannot be split over the length: a device does not know where its "
                "piece is. Build it with max_length=None."
            )

    @checked
    def __call__(
        self, x: Int[Array, " L"], *, reset: Bool[Array, " L"] | None = None, key: PRNGKeyArray | None = None
    ) -> Float[Array, "L V"]:
        return self.unembed(self.hidden(x, reset=reset, key=key))

    @checked
    def hidden(
        self, x: Int[Array, " L"], *, reset: Bool[Array, " L"] | None = None, key: PRNGKeyArray | None = None
    ) -> Float[Array, "L D"]:
        key = None if key is None else jr.fold_in(key, lax.axis_index(self.axis_name))
        run = in_shards(self.axis_name, reset)
        return self.model.forward_hidden(run, self.model.init_state(), x, key, reset=reset)[1]

    @checked
    def unembed(self, h: Float[Array, "*L D"]) -> Float[Array, "*L V"]:
        return self.model.unembed(h)
