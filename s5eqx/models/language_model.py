"""A language model: tied embedding, blocks, logits."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from s5eqx._typing import Array, Bool, Float, Int, PRNGKeyArray, PyTree, checked
from s5eqx._varying import error_if
from s5eqx.models._parts import count_layers, rows, token_rows
from s5eqx.models.backbone import Backbone
from s5eqx.models.init import AbstractInit, DefaultInit
from s5eqx.nn._check import check_rate
from s5eqx.nn._composed import AbstractComposed, in_chunks, in_parallel, in_steps
from s5eqx.nn._mixer import AbstractCausalMixer, refuse_reset
from s5eqx.nn._position import positions
from s5eqx.nn._random import split
from s5eqx.nn.block import Block
from s5eqx.nn.linear import times_transposed
from s5eqx.nn.mlp import MLP
from s5eqx.nn.stack import Stack


class LanguageModel(AbstractComposed):
    """Tokens in, logits of the next token out:

        logits = unembed(backbone(embed(tokens))),   unembed(h) = h E^T

    with `embed(tokens) = E[tokens]`, plus learned positions where `max_length` is given. `E` is tied: one
    array used twice. A token outside the vocabulary gives NaN, which an FFT or attention spreads to all steps; with the
    environment variable `S5EQX_DEBUG=1`, read when a call is traced, it is an error.

    The state is the position of the next token (None without learned positions) and the backbone's state.
    A reset starts a new sequence, at position 0.

    Source: the language models of the Hyena and S5 papers (arXiv 2302.10866, 2208.04933).

    Differs from the reference: one output, the logits; any length is taken where no positions are learned.
    """

    recurrence: ClassVar[tuple[str, ...]] = ()
    resets: ClassVar[bool] = True

    embedding: Float[Array, "V D"]
    positions: Float[Array, "max_length D"] | None
    embed_dropout: eqx.nn.Dropout
    backbone: Backbone

    def __init__(
        self,
        vocab_size: int,
        width: int,
        mixer: Callable[[PRNGKeyArray], AbstractCausalMixer] | tuple[AbstractCausalMixer, ...],
        *,
        num_layers: int | None = None,
        mlp_width: int,
        max_length: int | None = None,
        embed_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        stack: bool = False,
        remat: bool = False,
        init: AbstractInit = DefaultInit(),
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `vocab_size`: number of tokens, `V`.
        - `width`: channels of the residual stream, `D`.
        - `mixer`: a factory `key -> mixer`, called once for each layer; or a tuple of built mixers.
        - `num_layers`: number of blocks; may be left out for a tuple.
        - `mlp_width`: hidden channels of each block's MLP.
        - `max_length`: longest sequence, in tokens, for learned positions; None goes without them.
        - `embed_dropout`, `dropout`: the probability to drop an entry of the embedding, of a branch.
        - `drop_path`: the probability to drop a branch.
        - `stack`: hold equal blocks as one `Stack`, whose time to compile does not grow with the depth.
        - `remat`: compute the inside of a block again in the backward pass instead of keeping it. On CPU that saves
          memory with `stack` alone: outside a loop XLA puts off the gradients of weights, and holds what they need.
        - `init`: draws the embeddings and redraws the dense layers: `DefaultInit()`, `S5Init()` or `GPT2Init()`.
        """
        if vocab_size < 1 or width < 1:
            raise ValueError(f"vocab_size and width must be positive; got {vocab_size} and {width}.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be positive, or None for no positions; got {max_length}.")
        num_layers = count_layers(mixer, num_layers)
        table_key, positions_key, mixer_key, mlp_key, init_key = jr.split(key, 5)
        if isinstance(mixer, tuple):
            mixers, build = Stack.of(mixer).layer if stack else mixer, lambda mixer: mixer
        else:
            mixers, build = jr.split(mixer_key, num_layers), mixer

        def block(mixer, mlp_key, init_key):
            block = Block(build(mixer), MLP(width, mlp_width, key=mlp_key), dropout=dropout, drop_path=drop_path)
            return init.block(init_key, block, branches=2 * num_layers)

        columns: tuple[Any, ...] = mixers, jr.split(mlp_key, num_layers), jr.split(init_key, num_layers)
        blocks = Stack.build(block, *columns) if stack else tuple(map(block, *columns))
        self.embedding = init.table(table_key, jnp.zeros((vocab_size, width)))
        self.positions = None if max_length is None else init.table(positions_key, jnp.zeros((max_length, width)))
        self.embed_dropout = eqx.nn.Dropout(check_rate(embed_dropout, "embed_dropout"))
        self.backbone = Backbone(width, blocks, remat=remat)

    @checked
    def embed(
        self,
        tokens: Int[Array, "*L"],
        *,
        reset: Bool[Array, "*L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*L D"]:
        """What enters the backbone, for tokens that start a sequence."""
        return self._embed(self._start(), tokens, reset, key)[1]

    @checked
    def unembed(self, h: Float[Array, "*L D"]) -> Float[Array, "*L V"]:
        """Logits, at least float32, of the tied embedding."""
        return times_transposed(h, self.embedding, dtype=np.promote_types(h.dtype, np.float32))

    @checked
    def hidden(
        self,
        x: Int[Array, " L"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L D"]:
        """What `unembed` makes the logits of: `model(x) = model.unembed(model.hidden(x))`."""
        return self.forward_hidden(in_parallel(reset), self.init_state(), x, key, reset=reset)[1]

    @checked
    def __call__(
        self,
        x: Int[Array, " L"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "L V"]:
        return self.forward(in_parallel(reset), self.init_state(), x, key, reset=reset)[1]

    def init_state(self) -> PyTree[Array]:
        return self._start(), self.backbone.init_state()

    @checked
    def prefill(
        self,
        state: PyTree[Array],
        x: Int[Array, " L"],
        *,
        reset: Bool[Array, " L"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[PyTree[Array], Float[Array, "L V"]]:
        return self.forward(in_chunks(reset), state, x, key, reset=reset)

    @checked
    def step(
        self,
        state: PyTree[Array],
        x_t: Int[Array, ""],
        *,
        reset: Bool[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[PyTree[Array], Float[Array, " V"]]:
        return self.forward(in_steps(reset), state, x_t, key, reset=reset)

    def forward(self, run, state, x, key, *, reset=None):
        state, h = self.forward_hidden(run, state, x, key, reset=reset)
        return state, self.unembed(h)

    def forward_hidden(self, run, state, x, key, *, reset=None):
        """As `forward`, up to what `unembed` takes."""
        refuse_reset(self, reset)
        embed_key, backbone_key = split(key, 2)
        position, state = state
        position, h = self._embed(position, x, reset, embed_key)
        state, h = run(self.backbone, state, h, backbone_key)
        return (position, state), h

    def _start(self):
        return None if self.positions is None else jnp.zeros((), jnp.int32)

    def _embed(self, position, tokens, reset, key):
        h = token_rows(self.embedding, tokens)
        if self.positions is not None:
            max_length = len(self.positions)
            if reset is None and tokens.size > max_length:
                raise ValueError(
                    f"The model has learned positions for max_length={max_length} tokens; got a sequence of "
                    f"{tokens.size}. Build it with a larger max_length, or pass `reset` for packed sequences."
                )
            position, index = positions(position, tokens.size, None if reset is None else reset.reshape(-1))
            index = error_if(
                index,
                index >= max_length,
                f"A sequence is longer than the learned positions, max_length={max_length} tokens. Build the "
                "model with a larger max_length, or reset its state.",
            )
            h = h + rows(self.positions, index.reshape(tokens.shape))
        return position, self.embed_dropout(h, key=key)
