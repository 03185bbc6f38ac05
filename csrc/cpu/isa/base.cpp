#include "cpu/isa/table.inl"
