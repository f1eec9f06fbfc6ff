"""The same work on engines that run on many machines; needs the extra `ray`."""
