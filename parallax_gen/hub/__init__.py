"""Kernel packages of the Hugging Face hub: what `parallax-gen export --hub` writes."""
