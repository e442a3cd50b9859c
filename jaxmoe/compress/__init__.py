"""Smaller experts: eight-bit weights, merged experts, and one up projection for all.

`docs/compress.md` shows how the parts go together.
"""

from jaxmoe.compress.layers import merge_layer as merge_layer
from jaxmoe.compress.layers import num_bytes as num_bytes
from jaxmoe.compress.layers import quantize_layer as quantize_layer
from jaxmoe.compress.layers import share_layer as share_layer
from jaxmoe.compress.merge import MergedExperts as MergedExperts
from jaxmoe.compress.merge import merge_experts as merge_experts
from jaxmoe.compress.quantize import quantize_experts as quantize_experts
from jaxmoe.compress.sharing import share_up as share_up
from jaxmoe.quantized import QuantizedExperts as QuantizedExperts
