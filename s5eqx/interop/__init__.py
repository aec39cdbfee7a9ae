"""Weights of the official repositories, into our modules and back; and our own files.

from_s5, layer_from_s5, to_s5              lindermanlab/S5, branch `development`
from_safari, layer_from_safari,            HazyResearch/safari, and the S4D layer of state-spaces/s4
to_safari, layer_to_safari
save, load                                 any model or layer of this library
"""

from s5eqx.interop.s5 import from_s5 as from_s5
from s5eqx.interop.s5 import layer_from_s5 as layer_from_s5
from s5eqx.interop.s5 import to_s5 as to_s5
from s5eqx.interop.safari import from_safari as from_safari
from s5eqx.interop.safari import layer_from_safari as layer_from_safari
from s5eqx.interop.safari import layer_to_safari as layer_to_safari
from s5eqx.interop.safari import to_safari as to_safari
from s5eqx.interop.weights import load as load
from s5eqx.interop.weights import save as save
