"""Follow running jobs: in the terminal (`distclip watch`), or as a page in the browser (`distclip serve`)."""
