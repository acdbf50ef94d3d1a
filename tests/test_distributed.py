"""Two real processes under `accelerate launch`, on the CPU by gloo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)


# Of its launchers --use_fsdp names one that starts the processes itself; the script keeps to the CPU, and to DDP where it says so.
FLAGS = "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --num_processes 2 --num_machines 1"
FLAGS += " --mixed_precision no --dynamo_backend no --main_process_port 0"


def test_masks_agree_and_resume_in_new_processes_under_ddp_and_fsdp2(tmp_path):
    for part in ("run", "resume"):
        command = [sys.executable, "-m", "accelerate.commands.launch", *FLAGS.split()]
        command += [str(Path(__file__).with_name("distributed_run.py")), part, str(tmp_path)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
        assert f"{part} passed" in result.stdout
