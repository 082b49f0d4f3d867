// What the extension was built from; any4d_fast/_build.py writes the definitions.
#pragma once

namespace any4d {

const char* build_architectures();  // such as "80,90a"
const char* build_sources_key();    // hash of the contents of csrc/

}  // namespace any4d
