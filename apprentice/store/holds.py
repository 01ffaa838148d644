"""Who uses which version on a server that several processes share, so that the last one tidies up."""

from __future__ import annotations

from sqlalchemy import and_, bindparam, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from apprentice.store.database import Transaction
from apprentice.store.tables import version_holds as holds

__all__ = ["abandoned", "hold", "release"]

_this = and_(holds.c.server == bindparam("b_server"), holds.c.version == bindparam("b_version"))
_take = upsert(holds)
_hold = _take.on_conflict_do_update(
    index_elements=["server", "version", "owner"],
    # Who has loaded it once has loaded it, however often it is found there later.
    set_={
        "expires_at": _take.excluded.expires_at,
        "loaded": holds.c.loaded + (1 - holds.c.loaded) * _take.excluded.loaded,
    },
)
_all = select(holds.c.owner, holds.c.loaded, holds.c.expires_at).where(_this).order_by(holds.c.owner).with_for_update()
_leave = delete(holds).where(
    _this, (holds.c.owner == bindparam("b_owner")) | (holds.c.expires_at <= bindparam("b_now"))
)
_inherit = update(holds).where(_this).values(loaded=1)
_abandoned = (
    select(holds.c.version)
    .where(holds.c.server == bindparam("b_server"))
    .group_by(holds.c.version)
    .having(func.max(holds.c.expires_at) <= bindparam("b_now"), func.max(holds.c.loaded) == 1)
)


def hold(tx: Transaction, server: str, version: str, owner: str, expires_at: float, *, loaded: bool) -> None:
    values = {"server": server, "version": version, "owner": owner, "expires_at": expires_at, "loaded": int(loaded)}
    tx.run(_hold, values)


def release(tx: Transaction, server: str, version: str, owner: str, now: float) -> bool:
    this = {"b_server": server, "b_version": version}
    rows = tx.run(_all, this).fetchall()
    tx.run(_leave, {**this, "b_owner": owner, "b_now": now})
    others = any(holder != owner and expires_at > now for holder, _, expires_at in rows)
    loaded = any(loaded for _, loaded, _ in rows)
    if others and loaded:
        tx.run(_inherit, this)
    return loaded and not others


def abandoned(tx: Transaction, server: str, now: float) -> list[str]:
    return [version for (version,) in tx.run(_abandoned, {"b_server": server, "b_now": now}).fetchall()]
