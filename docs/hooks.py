"""Puts what is generated into the pages: `<!-- table: low-rank -->` becomes the table of these keys' declarations."""

from __future__ import annotations

import re

from lowrank_kernels.optim import keys

TABLES = {"low-rank": keys.LOW_RANK, "adamw": (*keys.ADAMW, keys.CAPTURABLE), "rso": keys.RSO}


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"<!-- table: ([\w-]+) -->", lambda found: keys.table(TABLES[found[1]]), markdown)
