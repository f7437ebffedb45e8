"""The kinds of failure that the control plane records and both halves act on: Instance.diagnosis, Incident.diagnosis."""

from __future__ import annotations

import enum


class Code(enum.StrEnum):
    """Why an engine ended, or why none could be started."""

    OUT_OF_MEMORY = "out_of_memory"
    NOT_A_MODEL = "not_a_model"
    TRUNCATED_MODEL = "truncated_model"
    UNSUPPORTED_MODEL = "unsupported_model"
    MISSING_FILE = "missing_file"
    BAD_TEMPLATE = "bad_template"
    UNKNOWN_OPTION = "unknown_option"
    BAD_OPTION = "bad_option"
    COUNTS_APART = "counts_apart"
    MISSING_PLUGIN = "missing_plugin"
    MISSING_LIBRARY = "missing_library"
    MISSING_PROGRAM = "missing_program"
    UNKNOWN_IMPORT = "unknown_import"
    BAD_WASM = "bad_wasm"
    NO_GPU = "no_gpu"
    PORT_TAKEN = "port_taken"
    KILLED = "killed"
    CRASHED = "crashed"
    START_TIMEOUT = "start_timeout"
    WRONG_SERVER = "wrong_server"
    WEDGED = "wedged"
    NOT_STARTED = "not_started"
    PREFLIGHT = "preflight"
    MEMORY = "memory"
    NODE_RESTARTED = "node_restarted"
    STOPPED = "stopped"
    UNKNOWN = "unknown"


# Trying again changes nothing until somebody acts, so no request needs to wait for it.
LASTING = frozenset(
    {
        Code.NOT_A_MODEL,
        Code.TRUNCATED_MODEL,
        Code.UNSUPPORTED_MODEL,
        Code.MISSING_FILE,
        Code.BAD_TEMPLATE,
        Code.UNKNOWN_OPTION,
        Code.BAD_OPTION,
        Code.COUNTS_APART,
        Code.MISSING_PLUGIN,
        Code.MISSING_LIBRARY,
        Code.MISSING_PROGRAM,
        Code.UNKNOWN_IMPORT,
        Code.BAD_WASM,
        Code.NO_GPU,
        Code.PREFLIGHT,
        Code.MEMORY,
    }
)
