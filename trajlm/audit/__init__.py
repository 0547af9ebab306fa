"""What a prepared folder holds, what it leaves out and which leaks stay open, counted again from its own files."""
