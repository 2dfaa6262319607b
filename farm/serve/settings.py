"""What the service is told, by a farm's file, by `serve.yaml` or on the command line of `serve run`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import ValidationError

from farm.config import FarmConfig
from farm.config_file import load_config
from farm.errors import UserError
from farm.serve.config import ServiceConfig
from farm.serve.listing import Described
from farm.signing import open_keys, public_text
from farm.store import open_store


class Settings(ServiceConfig):
    """The keys of `serve` in a farm's file, and beside them:

    store: the farm's store, as `open_store` takes it.
    concepts: the catalogue, to describe what is served, which is what the store publishes.
    public_keys: whose signatures count, as `signing.public_keys` of a farm; everything is served when there are none.
    """

    store: str
    concepts: tuple[Described, ...] = ()
    public_keys: tuple[str, ...] = ()

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Self:
        """Settings from arguments; `config`, the path of a farm's YAML, stands for those left out.

        Raises:
            UserError: an argument is missing, unknown or out of range, or the store cannot be opened.
        """
        given = dict(args)
        if path := given.pop("config", None):
            given = {**arguments(load_config(path)), **given}
        try:
            settings = cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise UserError(f"The service's argument {place}: {first['msg']}.") from error
        # Replicas may run in another folder, or on another machine.
        keys = tuple(map(public_text, open_keys(None, settings.public_keys).public))
        return settings.model_copy(update={"store": open_store(settings.store).url, "public_keys": keys})


def arguments(farm: FarmConfig) -> dict[str, Any]:
    """What a farm's file says, as `Settings.of` takes it."""
    concepts = [concept.model_dump(include={*Described.model_fields}) for concept in farm.catalogue]
    own = farm.serve.model_dump(include={*ServiceConfig.model_fields})
    return {"store": farm.store, "concepts": concepts, "public_keys": farm.signing.public_keys, **own}
