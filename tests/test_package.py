"""What importing the package brings with it."""

import subprocess
import sys


def test_importing_drt_needs_the_core_dependencies_only() -> None:
    code = (
        "import sys, drt\n"
        "extra = {'matplotlib', 'drt.training', 'drt.evaluation', 'drt.data'} & set(sys.modules)\n"
        "assert not extra, extra\n"
        "from transformers import AutoConfig\n"
        "assert AutoConfig.for_model('drt').__class__ is drt.DRTConfig\n"
        "for name in ('drt_ablation', 'landmark_attention', 'block_recurrent'):\n"
        "    assert AutoConfig.for_model(name).model_type == name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
