"""What started this process, read from its surroundings; light, since every command asks."""

from __future__ import annotations

import os

MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # what mpirun says, by implementation


def alone_of() -> int | None:
    """Of how many processes this one was to be, where `accelerate launch --cpu` started it alone; else None.

    Without mpirun it starts one process on a CPU, whatever number it is asked for. The number stands in its command.
    """
    if "MASTER_PORT" not in os.environ or "WORLD_SIZE" in os.environ or any(name in os.environ for name in MPI):
        return None
    import psutil  # comes with accelerate
    from accelerate.commands.launch import launch_command_parser

    launcher = psutil.Process().parent()
    words = [] if launcher is None else launcher.cmdline()
    if "launch" not in words:
        return None
    asked = launch_command_parser().parse_known_args(words[words.index("launch") + 1 :])[0].num_processes
    return asked if asked and asked > 1 else None
