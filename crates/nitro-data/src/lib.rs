//! Data: the shapes world (renderer, captions, exact judge, bench) and, later, dataset formats.
