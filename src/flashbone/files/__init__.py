"""What lies on disk: model files as streams, one file for each adapter format, and outputs that are whole or absent."""
