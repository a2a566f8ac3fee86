"""Files on disk: models as streams, adapters (a file for each format), their cards, and outputs whole or absent."""
