#include "whimbrel.h"

uint32_t whimbrel_abi_version(void) { return WHIMBREL_ABI_VERSION; }
