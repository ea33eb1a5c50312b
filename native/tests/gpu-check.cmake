# gpu-check.cmake: gpu-check, which tools/build/gpu_check.sh builds and calls. QAP_CHECKER=ON; it stands in for the Python module,
# so that a machine needs neither Python's headers nor pybind11.
set(QAP_GGML_SOURCE_DIR "" CACHE PATH "llama.cpp's ggml/src at the pin: the internal header of backends")
if(NOT EXISTS "${QAP_GGML_SOURCE_DIR}/ggml-backend-impl.h")
    message(FATAL_ERROR "expected ggml-backend-impl.h in QAP_GGML_SOURCE_DIR, got '${QAP_GGML_SOURCE_DIR}'; "
                        "use tools/build/gpu_check.sh, which knows where it is")
endif()

add_executable(gpu-check
    native/tests/gpu-check.cpp
    native/tests/check-scores.cpp
    native/tests/check-model.cpp
    native/tests/model-on-device.cpp
    native/tests/random-files.cpp
    native/tests/mirror-device.cpp)
target_include_directories(gpu-check PRIVATE native/src)
target_include_directories(gpu-check SYSTEM PRIVATE "${mtmd_dir}" "${vendor_dir}" "${QAP_GGML_SOURCE_DIR}")
target_compile_options(gpu-check PRIVATE ${our_warnings})
target_compile_definitions(gpu-check PRIVATE LLAMA_SHARED)
target_link_libraries(gpu-check PRIVATE qap-mtmd llama ggml::ggml Threads::Threads)
