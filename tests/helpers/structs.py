"""Structs that a kernel's header declares and Python mirrors."""

import re

from flash_attn_sm120 import jit


def fields_of(header, struct):
    """The names of the fields, in order, of a struct in ``kernels/<header>``."""
    text = (jit.kernel_directory() / header).read_text()
    body = re.search(rf"struct {struct} \{{(.*?)\n\}};", text, flags=re.S)[1]
    declared = re.sub(r"/\*.*?\*/", "", body, flags=re.S)
    return [re.findall(r"\w+", line)[-1] for line in re.split("[,;]", declared) if line.strip()]
