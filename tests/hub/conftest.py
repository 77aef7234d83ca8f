"""A hub package that several tests read; an empty database, the shipped records, and no outcomes of earlier checks."""

from __future__ import annotations

import pytest
from database_fixtures import empty_cache_folder, store
from hub_samples import small_package

from parallax_gen.hub.folder import HubPackage

__all__ = ["empty_cache_folder", "package", "store"]


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> HubPackage:
    return small_package(tmp_path_factory.mktemp("hub") / "attention")
