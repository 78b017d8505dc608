# Fails if the object of an instruction set defines a symbol that the linker may share with other
# objects. Run with cmake -P:
#
# OBJECTS  the objects of lk, separated by commas; those in kernels/ are checked
# NM       the program nm
#
# An inline function or template that several units compile is a weak symbol, of which the linker
# keeps one copy for all. If that were the copy of AVX-512, older CPUs would crash in it. So each weak
# symbol of kernels/<isa>.cpp must name lk::<isa>, either as its namespace or in its arguments.

string(REPLACE "," ";" objects "${OBJECTS}")
set(checked 0)
set(shared 0)
foreach(object IN LISTS objects)
  if(NOT object MATCHES "/kernels/([a-z0-9_]+)\\.cpp\\.o$")
    continue()
  endif()
  set(isa ${CMAKE_MATCH_1})
  execute_process(COMMAND ${NM} --demangle --defined-only ${object} OUTPUT_VARIABLE symbols
                  COMMAND_ERROR_IS_FATAL ANY)
  # Types of weak symbols: W and V, and u for GNU's unique ones.
  string(REGEX MATCHALL "[0-9a-f]+ [WwVvu] [^\n]*" weak "${symbols}")
  if(NOT weak)
    message(FATAL_ERROR "${object} has no weak symbols at all: were its symbols stripped?")
  endif()
  foreach(symbol IN LISTS weak)
    if(NOT symbol MATCHES "lk::${isa}::")
      message(SEND_ERROR "kernels/${isa}.cpp shares a symbol with other units: ${symbol}")
      math(EXPR shared "${shared} + 1")
    endif()
  endforeach()
  math(EXPR checked "${checked} + 1")
endforeach()
if(checked EQUAL 0)
  message(FATAL_ERROR "no object of an instruction set among: ${OBJECTS}")
endif()
if(shared EQUAL 0)
  message(STATUS "${checked} instruction sets share no symbol")
endif()
