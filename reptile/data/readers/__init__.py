"""Reading sources: folders and zips of images, published files, and what is drawn here."""
