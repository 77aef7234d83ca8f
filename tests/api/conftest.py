"""Each test here has an empty database, an empty folder of shipped records, and no GPU."""

from database_fixtures import empty_cache_folder, no_gpu, shipped_folder, store
from fake_card import fake_h200

__all__ = ["empty_cache_folder", "fake_h200", "no_gpu", "shipped_folder", "store"]
