"""Networks with what makes them denoisers, flow maps, token models or codecs; their descriptions and files."""
