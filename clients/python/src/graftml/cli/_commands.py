"""Names commands in the service's messages, which name calls, since they are for every language."""

import re

_COMMANDS = {
    "FineTune": "graft finetune",
    "GetJob": "graft jobs get",
    "ListJobs": "graft jobs",
    "WatchJob": "graft jobs watch",
    "CancelJob": "graft jobs cancel",
    "DeleteJob": "graft jobs delete",
    "RankBackbones": "graft rank",
    "UploadDataset": "graft datasets upload",
    "GetDataset": "graft datasets get",
    "ListDatasets": "graft datasets",
    "DeleteDataset": "graft datasets delete",
    "AddImages": "graft datasets add",
    "RemoveImages": "graft datasets remove",
    "RelabelImages": "graft datasets relabel",
    "ListImages": "graft datasets images",
    "EraseImage": "graft datasets erase",
    "RegisterBackbone": "graft backbones register",
    "ListBackbones": "graft backbones",
    "DeleteBackbone": "graft backbones delete",
    "Predict": "graft predict",
    "PredictStream": "graft predict",
    "GetModel": "graft models get",
    "ListModels": "graft models",
    "DeleteModel": "graft models delete",
    "GetVersion": "graft models get",
    "ListVersions": "graft models versions",
    "DeleteVersion": "graft models delete",
    "SetAlias": "graft models alias",
    "DeleteAlias": "graft models alias --delete",
    "RollbackAlias": "graft rollback",
    "PromoteVersion": "graft promote",
    "GetReport": "graft report",
    "ExportModel": "graft export",
    "set force": "use --force",
}
_CALLS = re.compile(rf"\b({'|'.join(sorted(_COMMANDS, key=len, reverse=True))})\b")
_FIELD = re.compile(r"`(base)`")


def in_commands(message: str) -> str:
    """Returns a message of the service with commands in the place of the calls that it names."""

    def command(found: re.Match[str]) -> str:
        text = _COMMANDS[found[0]]
        return f"`{text}`" if text.startswith("graft ") else text

    return _CALLS.sub(command, _FIELD.sub(r"--\1", message))
