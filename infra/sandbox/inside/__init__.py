"""Programs that run inside the container. They use nothing but the standard library and import nothing from here."""
