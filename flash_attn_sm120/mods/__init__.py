"""FlexAttention's score_mod and mask_mod: traced by torch, translated to CUDA C, compiled in.

capture.py   which tensors a callable captures, and when two callables are the same
trace.py     callable -> torch's ATen graph, of its gradient, too
translate.py graph -> CUDA C
headers.py   the texts that variants are compiled with, by number
program.py   graph -> text, which an operator takes, and back
operators.py calls that torch follows, as operators
dynamo.py    the same under Dynamo, where a callable is no object
reference.py what mods mean, in plain torch: calls of CPU tensors
attention.py the door: what flash_attn_func does with a mod
"""
