"""The corpus format: layout, writer, index, order, stream, repack and verify."""
