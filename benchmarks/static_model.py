"""What share of the mma.sync peak should a kernel reach? The model behind sass_report.py --shares.

Not a program. flash_attn_sm120/static_model.py predicts how long a call takes; sass_report.py
counts the instructions. Here are the devices that are predicted for, and what was measured.

Held against what it is not fitted to, D 80 to 256 at S 4096 (S05 in NOTES.md, older kernels), the
model is off by 4% (forward) and 5% (backward) at repeat 4, by 7 and 8% at repeat 2, root mean
square: within 4% where warps have 32 rows, mostly too high where they have 16. So it ranks tiles by
how they fill a card, not by a few percent. ENDS and HANDOVER are fitted to PROXY.
"""

from __future__ import annotations

from flash_attn_sm120.static_model import (
    GEFORCE,
    PRO,
    Device,
    Grid,
    Loop,
    Prediction,
    makespan,
    predict,
)

__all__ = ["DEVICES", "H100_HMMA", "PROXY", "Device", "Grid", "Loop", "Prediction"]
__all__ += ["makespan", "predict"]

# Cycles of HMMA.16816.F32 on an H100, measured: 2495 FLOP / clock / SM.
H100_HMMA = 4 * 4096 / 2495
DEVICES = {  # the H100's clock is that under load, measured
    "H100 x1": Device("sm_90a", 90, 132, 1, 1.75, 3050, 50),
    "H100 x2": Device("sm_90a", 121, 132, 2, 1.75, 3050, 50),
    "H100 x4": Device("sm_90a", 120, 132, 4, 1.75, 3050, 50),
    "GeForce": GEFORCE,
    "PRO": PRO,
}

# Shares that balance.py measured on one H100 ("The balance of sm_120" in NOTES.md, S09 and S10),
# by call and repeat. `--proxy FILE` puts a newer run in their place.
PROXY = {
    ("forward D 128, 32/8, S 4096 full", 4): 0.898,
    ("forward D 128, 32/8, S 4096 full", 2): 0.804,
    ("forward D 128, 32/8, S 4096 causal", 4): 0.876,
    ("forward D 128, 32/8, S 4096 causal", 2): 0.757,
    ("forward D 128, 32/8, S 8192 full", 4): 0.908,
    ("forward D 128, 32/8, S 8192 full", 2): 0.818,
    ("forward D 128, 32/8, S 8192 causal", 4): 0.908,
    ("forward D 128, 32/8, S 8192 causal", 2): 0.806,
    ("forward D 128, 32/8, S 1024 full", 4): 0.810,
    ("forward D 128, 32/8, S 1024 full", 2): 0.674,
    ("forward D 128, 32/8, S 1024 causal", 4): 0.685,
    ("forward D 128, 32/8, S 1024 causal", 2): 0.531,
    ("forward D 64, 32/8, S 8192 full", 4): 0.872,
    ("forward D 64, 32/8, S 8192 full", 2): 0.798,
    ("forward D 64, 32/8, S 8192 causal", 4): 0.882,
    ("forward D 64, 32/8, S 8192 causal", 2): 0.782,
    ("backward D 128, 32/32, S 4096 full", 4): 0.833,
    ("backward D 128, 32/32, S 4096 full", 2): 0.705,
    ("backward D 128, 32/32, S 4096 causal", 4): 0.810,
    ("backward D 128, 32/32, S 4096 causal", 2): 0.672,
    ("backward D 64, 16/16, S 8192 full", 4): 0.855,
    ("backward D 64, 16/16, S 8192 causal", 4): 0.838,
}
