"""The embedded demo: a made-up world of pictures, small models trained on it, and judges that took no part."""
