"""The few operations that an SAE is made of, as differentiable functions of tensors.

`sparse` touches k rows per vector wherever it can; `dense` is the same in plain autograd, the truth
that tests compare with. Start with `encode_topk` and `decode_topk`.
"""

from sparsight.sae.kernels.sparse import Precision, decode_topk, encode_topk

__all__ = ["Precision", "decode_topk", "encode_topk"]
