"""What attach() changes in the libraries whose loops it serves; all of it ends with the block, or says why not."""
