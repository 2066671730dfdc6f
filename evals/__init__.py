"""Measuring tools: what runs the quality and speed figures. Not part of the installed package."""
