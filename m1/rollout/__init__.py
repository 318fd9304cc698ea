"""Responses of a model: the engines that generate them, and sampling."""
