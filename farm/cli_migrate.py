"""`farm migrate`: a store that an older version wrote, for this one."""

from __future__ import annotations

import json

from farm.options import Config, Json, Override, load_config, naming, resumable


def migrate(config: Config, override: Override = None, as_json: Json = False) -> None:
    """Bring the store up to this version's layout; the same command goes on after an interruption.

    End runs and servers first, and `farm sync` is a backup. Nothing is done where there is nothing to do.
    """
    from farm import layout
    from farm.store import open_store

    loaded = load_config(config, override or [])
    with naming(config), resumable():
        store = open_store(loaded.store, loaded.cluster.store_patience_seconds, any_layout=True)
        marked = layout.layout_of(store) is None
        taken = layout.migrate(store)
    if as_json:
        facts = {"store": store.url, "layout": layout.LAYOUT, "from": taken[:1], "marked": marked}
        print(json.dumps(facts, indent=1))
    elif taken:
        print(f"{store.url}: was of layout {taken[0]} and is of layout {layout.LAYOUT}")
    else:
        print(f"{store.url}: is of layout {layout.LAYOUT}{', which it is marked with now' if marked else ''}")
