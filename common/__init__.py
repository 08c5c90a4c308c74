"""What every room needs: errors, settings, logging, metrics, Redis. Imports nothing of ours."""
