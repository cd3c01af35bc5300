"""Building pairs from real LQ photos with a generative editor: the open form of the GGT pipeline (docs/data_build.md)."""
