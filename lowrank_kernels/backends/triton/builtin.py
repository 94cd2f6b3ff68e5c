"""The built-in rows (configs.py): for each architecture and kind of dot, sorted by the rank that a row
covers.

None of them has been timed yet. Each compiles for its architecture within the limits that
tests/kernels/test_aot.py sets. The None rows serve unknown architectures, and shapes whose accesses are
narrower than 16 bytes.
"""

from .configs import BackProjectConfig, LimiterConfig, MomentsConfig, ProjectConfig, ProjectMomentsConfig, ScalingConfig, SinglePassConfig

# The last row serves every larger rank too, by looping or by more programs. Programs that share a strip of G
# run side by side, so a rank above BLOCK_R reads G again from L2.
PROJECT = {
    80: {
        "16bit": (
            ProjectConfig(32, 64, 64, 4, 3),
            ProjectConfig(64, 64, 64, 4, 3),
            ProjectConfig(128, 128, 64, 8, 3),
            ProjectConfig(256, 64, 64, 8, 3),
        ),
        "tf32": (ProjectConfig(32, 64, 32, 4, 3), ProjectConfig(64, 64, 32, 4, 3), ProjectConfig(128, 128, 32, 8, 3)),
        "ieee": (ProjectConfig(32, 64, 16, 4, 3), ProjectConfig(64, 64, 16, 4, 3), ProjectConfig(128, 64, 16, 8, 3)),
    },
    90: {
        "16bit": (
            ProjectConfig(32, 128, 64, 4, 4),
            ProjectConfig(64, 128, 64, 4, 4),
            ProjectConfig(128, 128, 64, 8, 3),
            ProjectConfig(256, 128, 64, 8, 3),
        ),
        "tf32": (ProjectConfig(32, 128, 32, 4, 3), ProjectConfig(64, 128, 32, 4, 3), ProjectConfig(128, 128, 32, 8, 3)),
        "ieee": (ProjectConfig(32, 64, 16, 4, 3), ProjectConfig(64, 64, 16, 8, 3), ProjectConfig(128, 64, 16, 8, 3)),
    },
    None: {
        "16bit": (ProjectConfig(32, 64, 32, 4, 2), ProjectConfig(64, 64, 32, 4, 2)),
        "tf32": (ProjectConfig(32, 64, 32, 4, 2), ProjectConfig(64, 64, 32, 4, 2)),
        "ieee": (ProjectConfig(32, 64, 16, 4, 2), ProjectConfig(64, 64, 16, 8, 2)),
    },
}
PROJECT[100] = PROJECT[90]

# The rows for r = 128 on sm_90 let two programs share a multiprocessor.
PROJECT_MOMENTS = {
    80: {
        "16bit": (ProjectMomentsConfig(64, 4, 64, 64, 4, 3), ProjectMomentsConfig(128, 8, 128, 64, 8, 3)),
        "tf32": (ProjectMomentsConfig(64, 4, 64, 32, 4, 3), ProjectMomentsConfig(128, 8, 64, 32, 8, 3)),
        "ieee": (ProjectMomentsConfig(64, 4, 64, 16, 8, 2),),
    },
    90: {
        "16bit": (
            ProjectMomentsConfig(64, 4, 128, 64, 4, 4),
            ProjectMomentsConfig(128, 8, 128, 64, 8, 3, maxnreg=128),
            ProjectMomentsConfig(256, 16, 128, 64, 16, 3),
        ),
        "tf32": (ProjectMomentsConfig(64, 4, 128, 32, 4, 3), ProjectMomentsConfig(128, 8, 128, 32, 8, 3)),
        "ieee": (ProjectMomentsConfig(64, 4, 64, 16, 8, 2),),
    },
    None: {
        "16bit": (ProjectMomentsConfig(32, 2, 64, 32, 4, 2), ProjectMomentsConfig(64, 4, 64, 32, 4, 2)),
        "tf32": (ProjectMomentsConfig(32, 2, 64, 32, 4, 2), ProjectMomentsConfig(64, 4, 64, 32, 4, 2)),
        "ieee": (ProjectMomentsConfig(32, 2, 64, 16, 4, 2), ProjectMomentsConfig(64, 4, 64, 16, 8, 2)),
    },
}
PROJECT_MOMENTS[100] = dict(PROJECT_MOMENTS[90])
PROJECT_MOMENTS[100]["16bit"] = (*PROJECT_MOMENTS[90]["16bit"][:2], ProjectMomentsConfig(256, 16, 128, 64, 8, 3))

BACK_PROJECT = {
    80: {
        "16bit": (BackProjectConfig(128, 128, 32, 8, 3),),
        "tf32": (BackProjectConfig(128, 128, 32, 8, 2),),
        "ieee": (BackProjectConfig(64, 64, 16, 4, 2),),
    },
    90: {
        "16bit": (BackProjectConfig(128, 128, 32, 8, 3), BackProjectConfig(64, 128, 64, 4, 3)),
        "tf32": (BackProjectConfig(128, 128, 32, 8, 3),),
        "ieee": (BackProjectConfig(64, 64, 16, 4, 2),),
    },
    None: {
        "16bit": (BackProjectConfig(64, 64, 32, 4, 2),),
        "tf32": (BackProjectConfig(64, 64, 32, 4, 2),),
        "ieee": (BackProjectConfig(64, 64, 16, 4, 2),),
    },
}
BACK_PROJECT[100] = BACK_PROJECT[90]

# As BACK_PROJECT. The program has a tile of G too.
RESIDUAL = {
    80: {
        "16bit": (BackProjectConfig(64, 128, 32, 8, 3),),
        "tf32": (BackProjectConfig(64, 128, 32, 8, 2),),
        "ieee": (BackProjectConfig(64, 64, 16, 4, 2),),
    },
    90: {
        "16bit": (BackProjectConfig(64, 128, 64, 8, 3),),
        "tf32": (BackProjectConfig(64, 128, 32, 8, 2),),
        "ieee": (BackProjectConfig(64, 64, 16, 4, 2),),
    },
    None: BACK_PROJECT[None],
}
RESIDUAL[100] = RESIDUAL[90]
SCALING = ScalingConfig(ROWS=16, COLUMNS=128, num_warps=4)
LIMITER = LimiterConfig(BLOCK=1024, num_warps=4)

# Keyed by dtype of the moments too, because decoding and encoding 8-bit moments takes registers. A row covers
# every rank up to its BLOCK_R; larger ranks are split. Every program reads P twice from L2. That is 4·r bytes
# a row, beside 6·BLOCK_N bytes of G and W in 16 bits, so a wide BLOCK_N pays. wgmma wants a BLOCK_M of 64 at
# least on the left side, and a BLOCK_N of 64 on the right. The None rows serve only the interpreter.
SINGLE_PASS = {
    80: {
        ("16bit", "fp32"): (
            SinglePassConfig(64, 4, 128, 64, 64, 8, 3, W_STAGES=3),
            SinglePassConfig(128, 8, 128, 64, 64, 8, 3, W_STAGES=3),
            SinglePassConfig(256, 16, 64, 64, 32, 8, 3, W_STAGES=3),
        ),
        ("16bit", "8-bit"): (
            SinglePassConfig(64, 4, 128, 64, 64, 8, 3, W_STAGES=3),
            SinglePassConfig(128, 8, 64, 64, 64, 8, 3, W_STAGES=3),
            SinglePassConfig(256, 16, 64, 64, 32, 8, 3, W_STAGES=3),
        ),
        ("tf32", "fp32"): (
            SinglePassConfig(32, 2, 64, 32, 64, 4, 3, W_STAGES=3),
            SinglePassConfig(64, 4, 64, 32, 64, 4, 3, W_STAGES=3),
            SinglePassConfig(128, 8, 64, 32, 32, 8, 3, W_STAGES=3),
        ),
    },
    90: {
        ("16bit", "fp32"): (
            SinglePassConfig(32, 2, 64, 64, 64, 4, 3, W_STAGES=3),
            SinglePassConfig(64, 4, 64, 64, 64, 4, 4, W_STAGES=3),
            SinglePassConfig(128, 8, 128, 64, 64, 16, 3, W_STAGES=3),
            SinglePassConfig(256, 16, 128, 32, 64, 8, 4, W_STAGES=3),
        ),
        ("tf32", "fp32"): (
            SinglePassConfig(32, 2, 64, 32, 64, 4, 3, W_STAGES=3),
            SinglePassConfig(64, 4, 64, 32, 64, 4, 3, W_STAGES=3),
            SinglePassConfig(128, 8, 64, 32, 64, 8, 3, W_STAGES=3),
        ),
    },
    # tcgen05 takes 4 or 8 warps. With 16 Triton multiplies as on sm_80.
    100: {
        ("16bit", "fp32"): (
            SinglePassConfig(32, 2, 64, 64, 64, 4, 3, W_STAGES=3),
            SinglePassConfig(64, 4, 64, 64, 64, 4, 4, W_STAGES=3),
            SinglePassConfig(128, 8, 128, 64, 64, 8, 3, W_STAGES=3),
            SinglePassConfig(256, 16, 64, 32, 64, 8, 3, W_STAGES=3),
        ),
        ("tf32", "fp32"): (
            SinglePassConfig(32, 2, 64, 32, 64, 4, 3, W_STAGES=3),
            SinglePassConfig(64, 4, 64, 32, 64, 4, 3, W_STAGES=3),
            SinglePassConfig(128, 8, 64, 32, 64, 8, 3, W_STAGES=3),
        ),
    },
    None: {
        ("16bit", "fp32"): (
            SinglePassConfig(16, 1, 64, 16, 16, 4, 2),
            SinglePassConfig(64, 2, 128, 32, 16, 4, 2, W_STAGES=2),
            SinglePassConfig(128, 8, 64, 32, 32, 4, 2, W_STAGES=3),
        ),
    },
}
SINGLE_PASS[None]["ieee", "fp32"] = SINGLE_PASS[None]["16bit", "fp32"]
for _kinds in SINGLE_PASS.values():
    for _kind, _ in list(_kinds):
        _kinds.setdefault((_kind, "8-bit"), _kinds[_kind, "fp32"])

MOMENTS = MomentsConfig(ROWS=1, COLUMNS=1024, num_warps=4)
MOMENTS_8BIT = MomentsConfig(ROWS=2, COLUMNS=256, num_warps=4)
