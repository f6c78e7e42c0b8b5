#!/usr/bin/env bash
# A C++ compiler that reads torch's headers once: tools/install.sh builds mmcv's ops with CXX=this.
#
# Of the time that one of mmcv's 77 files takes, half is debug information and most of the rest is
# reading torch/types.h. The first call compiles that header with the very flags of its own file,
# as GCC asks for; later calls start from the result. Where that does not work, files are compiled
# as usual. PCH_FOLDER is where the header (430 MB) goes; the caller removes it.
set -euo pipefail
flags=() file=
for ((i = 1; i <= $#; i++)); do
  case ${!i} in
    -MF | -o) ((++i)) ;;
    -MMD | -c) ;;
    *.cpp | *.cc) file=${!i} ;;
    *) flags+=("${!i}") ;;
  esac
done
[[ -n $file ]] || exec c++ "$@"

header=$PCH_FOLDER/types.h
{
  flock 9
  if [[ ! -e $header ]]; then
    echo '#include <torch/types.h>' >"$header"
    c++ "${flags[@]}" -g0 -x c++-header "$header" -o "$header.gch" || rm -f "$header.gch"
  fi
} 9>"$PCH_FOLDER/lock"
if [[ -e $header.gch ]] && c++ -include "$header" -Winvalid-pch "$@" -g0; then exit; fi
exec c++ "$@" -g0
