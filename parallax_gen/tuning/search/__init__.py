"""Chooses the next config to try, and evaluates such searches on recorded sweeps."""
