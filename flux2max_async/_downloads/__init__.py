"""Downloads: images into files, with safe names."""
