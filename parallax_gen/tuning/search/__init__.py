"""Which config to try next, and how well such searches do on recorded sweeps."""
