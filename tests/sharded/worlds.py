"""What the tests of this folder let two processes, four and one do. Each number of processes is started once,
because starting takes longer than most of what they do."""

import warnings

import test_fsdp
import test_memory
import test_messages
import test_sharded_rso
import test_sharded_waiting
import test_steps


def two(folder, everything, rank):
    warnings.simplefilter("ignore")  # ranks are clamped
    return {
        "steps": test_steps.process(everything),
        "messages": test_messages.process(),
        "fsdp": test_fsdp.process(folder, everything),
        "rso": test_sharded_rso.process(folder, everything),
        "waiting": test_sharded_waiting.process(),
        "memory": test_memory.process(),
    }


def four(everything, rank):
    warnings.simplefilter("ignore")
    return {"steps": test_steps.process(everything), "rso": test_sharded_rso.copies_of_two()}


def alone(folder, everything, rank):
    """Goes on from what two have saved, and saves for two."""
    warnings.simplefilter("ignore")
    return {"fsdp": test_fsdp.alone(folder, everything), "rso": test_sharded_rso.alone(folder, everything)}


def together(folder, everything, rank):
    """Two, as copies of a mesh of one: they go on from what one, and two, have saved."""
    warnings.simplefilter("ignore")
    return test_fsdp.together(folder, everything)
